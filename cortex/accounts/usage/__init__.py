"""What was used: a record of each request, written to the database, and the reports made of them."""
