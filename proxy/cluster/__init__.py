"""The workers as this proxy knows them: connections, greetings, silence, what they have in hand."""
