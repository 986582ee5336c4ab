"""How a database is observed for OpenTelemetry."""
