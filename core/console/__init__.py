"""Reports to the user and requests from them: status lines, event files, keys, signals."""
