"""What a report consists of, and how it is shown: as tables on a terminal, and as a page of its own."""
