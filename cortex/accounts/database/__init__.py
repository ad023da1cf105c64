"""The database of keys, limits, usage and energy: its tables, its migrations, and how it is opened.

Only the control process and the usage recorder open it. Workers never import SQLAlchemy.
"""
