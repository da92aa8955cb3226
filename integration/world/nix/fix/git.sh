mv "$out/bin/git" "$out/lib/git-core/git"
wrap "$out/bin/git" "$out/lib/git-core/git" \
	"GIT_EXEC_PATH=$out/lib/git-core" "GIT_TEMPLATE_DIR=$out/share/git-core/templates" "PERL5LIB=$(perl_path)" \
	"PATH=\${PATH:+\$PATH:}$(dirname "$(find_in bin/less)"):$(dirname "$(find_in bin/ssh)")"
