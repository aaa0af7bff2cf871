"""Results of finished stages and searches, read from their artifacts."""
