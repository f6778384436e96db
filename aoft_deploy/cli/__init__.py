"""One module per command: parse the arguments, call one library function, print the result."""
