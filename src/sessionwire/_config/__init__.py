"""Where settings come from, and how their errors are reported."""
