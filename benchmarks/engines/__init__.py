"""How engines are started, and how one method is measured in one."""
