"""One module per group of verbs. Each verb parses its options, makes one library call and prints the result."""
