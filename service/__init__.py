"""What ships: the application that chapter 3 describes, its log, and the server that runs it."""
