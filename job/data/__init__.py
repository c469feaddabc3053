"""From rows to tokens: row formats, chat templates, label masking and packing."""
