mv "$out/bin/file" "$out/bin/.file"
wrap "$out/bin/file" "$out/bin/.file" "MAGIC=$(find_in lib/file/magic.mgc)"
