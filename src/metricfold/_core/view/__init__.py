"""What a reduction has brought, looked at from any side."""
