"""What this machine gives and allows: settings, access, logs, memory, files."""
