from trainfw.cli import main

main()
