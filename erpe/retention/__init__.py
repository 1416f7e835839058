"""Remove trials that are no longer needed (`erpe gc`)."""
