mv "$out/bin/openssl" "$out/bin/.openssl"
wrap "$out/bin/openssl" "$out/bin/.openssl" "OPENSSL_CONF=$out/lib/ssl/openssl.cnf"
