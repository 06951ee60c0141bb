"""What the two commands share with the user: options, one run, a conversation, a live view."""
