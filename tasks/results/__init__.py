"""Results of finished stages and searches: readers of their artifacts, wording for people, and names of runs."""
