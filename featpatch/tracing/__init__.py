"""Attribution graphs and query-key attribution: one prompt, with attention patterns and the scales of norms frozen."""
