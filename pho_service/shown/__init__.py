"""A job or a study as one page of HTML that needs no network. No torch."""
