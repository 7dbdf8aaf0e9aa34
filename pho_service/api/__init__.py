"""The HTTP front end: takes jobs, reports on them, and never touches a model."""
