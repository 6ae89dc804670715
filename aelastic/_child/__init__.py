"""What runs inside workers: standard library only, nothing of the supervisor's is imported here."""
