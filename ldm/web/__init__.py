"""The page and the HTTP API over the library: one process, one worker, nothing kept of what was asked for."""
