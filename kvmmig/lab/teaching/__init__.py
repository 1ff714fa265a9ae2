"""Teaching labs: their folders, a copy for a student, and the check of it."""
