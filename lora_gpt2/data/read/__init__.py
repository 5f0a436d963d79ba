"""From files, tables and data sets to documents, as they are."""
