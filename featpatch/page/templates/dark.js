// DataTables reads a class, not the preference; what is printed is light.
const preference = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark", preference.matches);
preference.addEventListener("change", follow);
addEventListener("beforeprint", () => document.documentElement.classList.remove("dark"));
addEventListener("afterprint", follow);
follow();
