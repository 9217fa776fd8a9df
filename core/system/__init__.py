"""What the operating system gives: files that are whole or not there, outputs, signals, names."""
