from parallel_parnet.commands import main

main()
