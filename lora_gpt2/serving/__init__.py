"""The HTTP API and the web page over one inference session (extra `serve`)."""
