"""What people read: tables (torch-free) and progress bars."""
