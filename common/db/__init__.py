"""All SQL. Functions that take `tx` run inside somebody's transaction and never commit."""
