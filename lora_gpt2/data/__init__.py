"""From files to blocks of tokens; nothing here but `tokenizer` knows a model, and nothing imports torch."""
