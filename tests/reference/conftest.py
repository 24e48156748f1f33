import ds4_mtp_plugin  # noqa: F401  (before the host)
