"""The HTTP front end: takes jobs, tells of them, and never touches a model."""
