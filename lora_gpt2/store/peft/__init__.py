"""PEFT's adapter format and the formats that become it; imports torch."""
