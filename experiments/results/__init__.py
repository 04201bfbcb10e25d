"""Result files, one beside each figure, and the tables that the README makes of them."""
