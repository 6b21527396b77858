"""Every figure that the README quotes, each a ratio measured side by side in one run."""
