; int 10h, the screen: text goes to the serial port, and a terminal is told the rest by ANSI's control sequences

int10:
    SERVICE
    cmp ah, 0x0e
    je .teletype
    cmp ah, 0x00
    je .mode
    cmp ah, 0x01                            ; the cursor's shape
    je leave_service
    cmp ah, 0x02
    je .place_cursor
    cmp ah, 0x03
    je .where_is_cursor
    cmp ah, 0x05                            ; the page
    je leave_service
    cmp ah, 0x06
    je .scroll_up
    cmp ah, 0x07
    je .scroll_down
    cmp ah, 0x09
    je .write_here
    cmp ah, 0x0a
    je .write_here
    cmp ah, 0x0b                            ; the border's colour
    je leave_service
    cmp ah, 0x0f
    je .which_mode
    cmp ah, 0x10                            ; the palette, blinking
    je leave_service
    cmp ah, 0x13
    je .write_string
    cmp ah, 0x1a                            ; a display adapter's services: there is none
    je .no_such
    cmp ah, 0x4f
    je .no_such
.unserved:
    UNSERVED 0x10
.no_such:
    mov word [bp + C_AX], 0x0100
    jmp leave_service

.teletype:
    call type_char
    jmp leave_service

.mode:
    and al, 0x7f
    cmp al, 3
    jbe .clear
    cmp al, 7
    jne .unserved                           ; graphics
.clear:
    cmp word [CURSOR], 0                    ; nothing was written: a terminal keeps what it shows
    je leave_service
    mov si, erase
    call type_sequence
    mov si, home
    call type_sequence
    mov word [CURSOR], 0
    jmp leave_service

.place_cursor:
    call place_cursor
    jmp leave_service

.where_is_cursor:
    mov ax, [CURSOR]
    mov [bp + C_DX], ax
    mov word [bp + C_CX], 0x0607
    jmp leave_service

.scroll_up:
    mov bl, 'S'
    jmp .scroll
.scroll_down:
    mov bl, 'T'
.scroll:
    test al, al
    jz .erase
    call type_csi
    call type_number
    mov al, bl
    call type_raw
    jmp leave_service
.erase:
    cmp word [CURSOR], 0
    je leave_service
    mov si, erase
    call type_sequence
    jmp leave_service

.write_here:                                ; the cursor stays where it is
    jcxz .written
    cmp cx, 80 * 25
    ja .unserved
    mov bl, al
    mov si, save_cursor
    call type_sequence
.again:
    mov al, bl
    call type_raw
    loop .again
    mov si, restore_cursor
    call type_sequence
.written:
    jmp leave_service

.which_mode:
    mov word [bp + C_AX], 0x5003
    mov byte [bp + C_BX + 1], 0
    jmp leave_service

.write_string:                              ; at caller's ES:BP, AL bit 0: the cursor moves, bit 1: with colours
    mov bl, al
    mov di, [CURSOR]
    cmp dx, di
    je .placed
    call place_cursor
.placed:
    mov si, [bp + 12]                       ; the caller's BP
    mov ds, [bp + C_ES]
.next:
    jcxz .string_done
    lodsb
    test bl, 2
    jz .one
    inc si
.one:
    push ds
    push 0
    pop ds
    call type_char
    pop ds
    dec cx
    jmp .next
.string_done:
    push 0
    pop ds
    test bl, 1
    jnz leave_service
    mov dx, di
    call place_cursor
    jmp leave_service

; Put the cursor to row DH, column DL.
place_cursor:
    mov [CURSOR], dx
    call type_csi
    mov al, dh
    inc al
    call type_number
    mov al, ';'
    call type_raw
    mov al, dl
    inc al
    call type_number
    mov al, 'H'
    jmp type_raw

; Type AL, and count where the cursor is.
type_char:
    call type_raw
    cmp al, 13
    je .first_column
    cmp al, 10
    je .next_row
    cmp al, 8
    je .back
    cmp al, 7
    je .done
    inc byte [CURSOR]
    cmp byte [CURSOR], 80
    jb .done
    call .next_row
.first_column:
    mov byte [CURSOR], 0
.done:
    ret
.next_row:
    cmp byte [CURSOR + 1], 24
    jae .done
    inc byte [CURSOR + 1]
    ret
.back:
    cmp byte [CURSOR], 0
    je .done
    dec byte [CURSOR]
    ret

; Type AL as it is.
type_raw:
    push dx
    mov dx, SERIAL
    out dx, al
    pop dx
    ret

type_csi:
    push ax
    mov al, 27
    call type_raw
    mov al, '['
    call type_raw
    pop ax
    ret

; Type AL in decimal.
type_number:
    push ax
    aam 100
    test ah, ah
    jz .tens
    push ax
    mov al, ah
    add al, '0'
    call type_raw
    pop ax
.tens:
    aam
    push ax
    mov al, ah
    add al, '0'
    call type_raw
    pop ax
    add al, '0'
    call type_raw
    pop ax
    ret

; Type ESC and the text at CS:SI.
type_sequence:
    push ax
    mov al, 27
.next:
    call type_raw
    cs lodsb
    test al, al
    jnz .next
    pop ax
    ret

erase:          db "[2J", 0
home:           db "[H", 0
save_cursor:    db "7", 0
restore_cursor: db "8", 0
