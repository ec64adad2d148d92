"""Pure numpy on choices and numbers: no network, file or device is known here."""
