"""Tools for people: the command line, and the whole product on one machine."""
