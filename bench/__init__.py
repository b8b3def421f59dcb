"""What the product does in a second, beside what could be done on the same machine in the same minute."""
