"""Read the sources of settings, explain wrong settings, and understand URLs."""
