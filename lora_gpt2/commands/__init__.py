"""One file per command: parse the options, make the domain call, render its result. No logic lives here."""
