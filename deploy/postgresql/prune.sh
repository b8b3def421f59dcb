# Keeps the last base backups, and of the archive what they need to be restored to any moment since the oldest of them.
#
#     BACKUPS=/backups ARCHIVE=/archive KEEP=2 sh prune.sh
#
# Source: PostgreSQL, "pg_archivecleanup", "Making a Base Backup".
set -eu
: "${BACKUPS:?the folder of the base backups}" "${ARCHIVE:?the folder of the archive}" "${KEEP:?how many backups}"
oldest=$(ls -d "$BACKUPS"/*Z | tail -n "$KEEP" | head -n 1)
first=$(sed -n 's/^START WAL LOCATION: .* (file \([0-9A-F]*\))$/\1/p' "${oldest:?no backup}/backup_label")
pg_archivecleanup "$ARCHIVE" "${first:?no file of write-ahead log}"
for backup in "$BACKUPS"/*Z; do
  if [ "$backup" = "$oldest" ]; then
    break
  fi
  rm -r "$backup"
done
