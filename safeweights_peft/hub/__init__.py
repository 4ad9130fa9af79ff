"""Push patches and maps to the Hub, pull and find them there, and write their cards."""
