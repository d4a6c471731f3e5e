"""Generation by the base and its experts inside vLLM: `VllmEngine`, and the plugin that vLLM loads."""
