wrap "$out/bin/perl" "$(find_in bin/perl)" "PERL5LIB=\${PERL5LIB:+\$PERL5LIB:}$(perl_path)"
