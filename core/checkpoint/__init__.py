"""The model folder: saves, their format, the lock, what is read of one."""
