"""One module a group of verbs. Each verb parses its options, makes one library call and prints what comes back."""
