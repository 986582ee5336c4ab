"""Libraries that people put on a session, each tried as its users would."""
