"""The migrations of the database, in Alembic's form. They run when it is opened."""
