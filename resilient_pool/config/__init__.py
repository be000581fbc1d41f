"""What the application says, validated: the constructor's arguments, DSNs, password files, secrets."""
